"""What stage one writes: the teacher's targets, their sizes, and the directory that holds them."""
