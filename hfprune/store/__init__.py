"""The artifact store: keys, folders, manifests, results, provenance.

Any package may import it. It imports only `errors`.
"""
