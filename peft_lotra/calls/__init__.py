"""The context of a running call, and layers' passes in which samples differ."""
