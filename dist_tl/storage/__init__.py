"""Storage of bytes: object stores behind fsspec, the keys of a run, and a small S3 server."""
