"""2D image fitting (section 4.1 of the paper): a field that memorises a photograph, with any of the samplers."""
