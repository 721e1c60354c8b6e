"""Pages in a browser, one for each system, served on this machine alone: each is ``build(fn)`` and ``main()``.

A page draws and asks; what it asks is handed to it, so that it can be built, looked at and tested without a model.
"""
