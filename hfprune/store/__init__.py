"""The artifact store: keys, folders, manifests, provenance. Any package may import it; it imports none of them."""
