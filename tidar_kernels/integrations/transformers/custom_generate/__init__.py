"""What `generate(.., custom_generate=<folder>, trust_remote_code=True)` looks for in a folder."""
