"""How blobs come in: one recording per digest, fetched in slices, hashed and published; and how they are read.

Import `recorder.Recorder` and `reader.Reader`. Begin with `recording`; `slicing` decides which slice comes next.
"""
