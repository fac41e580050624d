"""`portalm bench`: one small file a kind of measurement."""
