"""Artifacts by hash: keys, folders, manifests, how a result came to be. Any room may import it; it imports none."""
