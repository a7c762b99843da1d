"""What is measured on the pocket editor, and how. Not part of the published pack."""
