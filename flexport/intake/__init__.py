"""From JSONL lines to rows, requests and micro-batches of token ids.

It knows no model and no device: a tokenizer is something that encodes, a context is a number.
"""
