"""Recording of blobs: one recording per digest, fetched in slices, hashed and published; and reading them.

Import `recorder.Recorder` and `reader.Reader`. Begin with `recording`, whose states are in `states`; `plan` decides
what is fetched next, by which connection, and what happens after a failure.
"""
