"""What people and the daemon do to stored models: list, remove, evict, verify, import, export.

Everything here works on a store that is handed in. Begin with `listing` (what is shown) and `eviction` (what is
removed).
"""
