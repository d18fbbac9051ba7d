"""Classifiers under a shift of the images: which classes count, ReaL's labels, the corruptions' error."""
