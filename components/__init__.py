""" What the scripts share, one concept per file. README.md says where to change what. """
