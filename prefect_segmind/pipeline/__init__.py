"""One picture from job to address, a module for each stage."""
