"""What is stored: verified blobs, manifests, recordings in progress, and the index of what is known of them.

Import `store.Store`; `snapshot` looks at a store without opening it. diskcache is imported here only. Begin with
`store`, whose docstring shows the folder.
"""
