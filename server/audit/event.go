package audit

import (
	"encoding/json"
	"fmt"
	"time"
)

// Event is what a line says was done, as far as somebody needs it who asks what
// happened after a moment of the store.
type Event struct {
	Seq  uint64
	Time time.Time
	// StoreRevision is what the store had reached when the line was written. A
	// move of a root was committed after it, other acts at or before it.
	StoreRevision int64
	Action        string
	OK            bool
	SPIFFEID      string
	EntryID       string
	AgentID       string
	AuthorityID   string
}

// Events calls visit for every line from the oldest file that is kept beside
// path to the end of path, and checks the chain on the way like Verify.
func Events(path string, visit func(Event) error) error {
	v := verifier{visit: func(line []byte) error {
		e, err := parseEvent(line)
		if err != nil {
			return err
		}
		return visit(e)
	}}
	_, err := v.files(path)
	return err
}

func parseEvent(line []byte) (Event, error) {
	var raw struct {
		Seq           uint64    `json:"seq"`
		Time          time.Time `json:"time_wall"`
		StoreRevision int64     `json:"store_revision"`
		Action        string    `json:"action"`
		Target        struct {
			SPIFFEID    string `json:"spiffe_id"`
			EntryID     string `json:"entry_id"`
			AgentID     string `json:"agent_id"`
			AuthorityID string `json:"authority_id"`
		} `json:"target"`
		Result struct {
			Code string `json:"code"`
		} `json:"result"`
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return Event{}, fmt.Errorf("%w: %w", errNotALine, err)
	}
	return Event{
		Seq: raw.Seq, Time: raw.Time, StoreRevision: raw.StoreRevision, Action: raw.Action, OK: raw.Result.Code == "ok",
		SPIFFEID: raw.Target.SPIFFEID, EntryID: raw.Target.EntryID, AgentID: raw.Target.AgentID, AuthorityID: raw.Target.AuthorityID,
	}, nil
}
