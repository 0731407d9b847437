"""Our own HTTP client towards registries and the hosts of blobs, and the checks on what they answer.

Import `upstream.Upstream`. Signed addresses and credentials stay in memory here. Begin with `upstream`, then
`response_checks`.
"""
