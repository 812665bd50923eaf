"""The nets' convolutions, and other ways than the library's to compute them; `modules.py` chooses."""
