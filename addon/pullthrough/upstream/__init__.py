"""Our own HTTP client towards registries and the hosts of blobs, and the checks on what they answer.

Import `client.Upstream`. Signed addresses and credentials stay in memory here. Begin with `client`, then
`response_checks`.
"""
