"""Bridges to other libraries; each is imported by name, and only then needs that library."""
