"""From token ids to text, and from completions to JSONL lines that outlive a kill.

It does not know how the tokens were made.
"""
