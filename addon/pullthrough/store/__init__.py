"""The store on disk: verified blobs, manifests, recordings in progress, and the index of their facts.

Import `store.Store`; `snapshot` looks at a store without opening it. Only this package imports diskcache. Begin
with `store`, whose docstring shows the folder.
"""
