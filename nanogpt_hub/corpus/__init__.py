"""What text is made of and what is found in it: file formats, stories, mixtures, duplicates, an audit."""
