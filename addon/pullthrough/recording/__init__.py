"""How blobs come in: one recording per digest, fetched in slices, hashed and published; and how they are read.

Import `recorder.Recorder` and `reader.Reader`. Begin with `recording`, whose states are in `states`; `plan` decides
what is fetched next, by whom, and what follows when it fails.
"""
