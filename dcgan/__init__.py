"""DCGAN training and representation evaluation, after Radford, Metz and Chintala (2015), arXiv:1511.06434."""
