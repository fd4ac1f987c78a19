"""Where packaged models are pushed to besides the claim: OCI registries and S3."""
