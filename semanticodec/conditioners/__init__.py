"""What generation is conditioned on: labels, CLAP, FLAN-T5, phonemes, and AudioMAE features written by GPT-2.

The networks of other houses come from transformers (extra ``generation``), phonemes from phonemizer (extra
``speech``); both are imported when they are first needed.
"""
