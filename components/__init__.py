""" What the scripts share, one concept a file. README.md says where to change what. """
