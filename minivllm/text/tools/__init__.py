"""Parsers of calls: one file for each way in which models write that they call a function, and what those files share.

``registry`` names them. What a parser is: ``minivllm.text.reply``.
"""
