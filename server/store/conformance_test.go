package store_test

import (
	"testing"

	"github.com/seed-caa81108/assay/server/store"
	"github.com/seed-caa81108/assay/server/store/storetest"
)

func TestBoltHoldsTheContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) func() store.KV {
		dir := t.TempDir()
		var last *store.Bolt
		t.Cleanup(func() {
			if err := last.Close(); err != nil {
				t.Error(err)
			}
		})
		return func() store.KV {
			if last != nil {
				if err := last.Close(); err != nil {
					t.Fatal(err)
				}
			}
			b, err := store.OpenBolt(store.BoltConfig{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			last = b
			return b
		}
	})
}
