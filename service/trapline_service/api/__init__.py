"""HTTP and WebSockets: one module per resource; each only translates."""
