package state

// Secret returns the bytes of a key.
func Secret(k CacheKey) []byte { return k.secret() }
