"""The options: their names, texts and grammar, the settings made from them, and the default places of files.

Import `settings.Settings` and its enums; only the daemon and the command line parse options. Begin with `options`.
"""
