"""A repository of models for NVIDIA's Triton Inference Server.

`repository.py` writes it, with the `config.pbtxt` of `config.py`. `model.py` is copied into it: Triton's Python backend
imports it, and it answers requests with `requests.py`.
"""
