"""Where bytes live: any fsspec store, the key of everything we write, a small S3 server."""
