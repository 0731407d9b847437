"""What several caches share through an object store: documents, blobs, leases.

Import `tier.Tier`. obstore is imported here only; without the option `object_store` nothing in this package runs. Begin
with `documents`, which has the layout and the signatures.
"""
