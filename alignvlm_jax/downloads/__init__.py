"""Recognizes what downloads leave behind: stubs of files, links, caches of the Hub, and folders without weights.

Nothing here reads weights or unpickles. The functions say what a file or folder is, and what to do about it.
"""
