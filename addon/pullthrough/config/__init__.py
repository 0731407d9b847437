"""The options: their names, texts and grammar, the settings that they make, and where things lie by default.

Import `settings.Settings` and its words; only the daemon and the command line parse options. Begin with `options`.
"""
