"""Methods that remove layers and fit a linear map in their place."""
