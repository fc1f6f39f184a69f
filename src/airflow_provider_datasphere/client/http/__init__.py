"""HTTP to presigned URLs."""
