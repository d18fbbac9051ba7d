"""The functions behind `import mimscale`: a module each. What `mimscale.__all__` does not name is internal."""
