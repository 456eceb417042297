"""What generation is conditioned on: CLAP, FLAN-T5, phonemes, AudioMAE features and the sequence GPT-2 makes of them.

The networks of other houses come from transformers (extra ``generation``), phonemes from phonemizer (extra
``speech``); both are imported when they are first needed.
"""
