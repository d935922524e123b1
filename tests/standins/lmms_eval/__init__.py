"""Stand-in for lmms-eval where it is not installed (it asks for an older PyAV than this project): the classes that a
plugin of it meets, with the members and the signatures of its version 0.7.3 and none of its tasks."""
