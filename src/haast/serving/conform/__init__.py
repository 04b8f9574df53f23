"""A black-box check of any OpenAI-compatible endpoint: `haast conform`.

Owns what is asked of a server, how its answers are judged, and the tables. Knows servers by HTTP alone: nothing here
imports Haast's own server, a model or torch, and every server is judged by the same questions.
"""
