"""The command line `mdm`: its tree, and the commands that need several rooms."""
