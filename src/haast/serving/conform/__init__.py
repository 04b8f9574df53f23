"""Black-box conformance checks for any OpenAI-compatible server: `haast conform`.

Owns the requests, the verdicts and the result tables. Knows servers through HTTP only: nothing here imports Haast's own
server, a model or torch, and all servers get the same checks.
"""
