"""Serving: a policy behind OpenAI's endpoints, its requests decoded together.

HTTP body → `schema` → `Desk` → `Request` → `Engine` (one thread, one `Batch`) → `Piece` → `replies`
→ HTTP. `Gate` stands around it: key, size, log, metrics. The owner of the HTTP libraries.
"""
