package backup

import (
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

const (
	magic = "assay backup 1\n"
	// macName separates this use of the seal key's MAC from that of records.
	macName = "backup/file"
	// maxHeader bounds the header's JSON.
	maxHeader = 64 << 10
	// maxValue bounds a record: no commit is larger.
	maxValue = store.MaxCommitBytes
)

// MAC authenticates a value under a name; see keys.SealKey.
type MAC func(name string, value []byte) []byte

// Header says what a backup is of.
type Header struct {
	TrustDomain string    `json:"trust_domain"`
	Revision    int64     `json:"revision"` // of the store, at the moment that the backup shows
	TakenAt     time.Time `json:"taken_at"`
	Version     string    `json:"version"` // of the server that wrote it
}

func damaged(text string) error {
	return fault.New(fault.Invalid, "backup_damaged",
		"the backup can't be used, "+text+": nothing was changed; use another backup")
}
