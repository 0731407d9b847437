"""What the daemon reports about itself: metrics, health, the status page, the format of log lines.

Begin with `status` (the data), `status_page` (the presentation) and `metrics`. The pages' files are in
`share/`.
"""
