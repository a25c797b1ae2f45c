package store

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

type sample struct {
	Name string            `json:"name"`
	N    int64             `json:"n,omitempty"`
	Raw  []byte            `json:"raw,omitempty"`
	Tags map[string]string `json:"tags,omitempty"`
}

func TestRecordsRoundTrip(t *testing.T) {
	for _, want := range []sample{{}, {Name: "a\x00ä\n", N: -1 << 62, Raw: []byte{0, 255}, Tags: map[string]string{"": "x"}}} {
		data, err := Encode(3, want)
		if err != nil {
			t.Fatal(err)
		}
		if data[0] != 3 {
			t.Errorf("version %d", data[0])
		}
		for _, known := range []byte{3, 4, 255} {
			var got sample
			if err := Decode(data, known, &got); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("known %d: %+v, %v", known, got, err)
			}
		}
	}
	_, err := Encode(1, func() {})
	wantReason(t, err, fault.Internal, "record_not_encodable")
}

func TestDecodeRefusesWhatItDoesNotKnow(t *testing.T) {
	for text, reason := range map[string]string{
		"":                                 "store_corrupt",
		"\x01":                             "store_corrupt",
		"\x01{":                            "store_corrupt",
		"\x01null":                         "store_corrupt",
		"\x01 null ":                       "store_corrupt",
		"\x01[]":                           "store_corrupt",
		"\x01{\"name\":1}":                 "store_corrupt",
		"\x01{\"other\":1}":                "store_corrupt",
		"\x01{\"name\":\"a\"}x":            "store_corrupt",
		"\x01{\"name\":\"a\"}{}":           "store_corrupt",
		"\x01{\"name\":\"a\"}\n":           "store_corrupt",
		"\x01{\"n\":99999999999999999999}": "store_corrupt",
		"\x03{\"name\":\"a\"}":             "store_newer",
		"\xff":                             "store_newer",
	} {
		var got sample
		wantReason(t, Decode([]byte(text), 2, &got), fault.Precondition, reason)
	}
}

// FuzzDecode holds Decode to: refuse, or return what encodes to the same again.
func FuzzDecode(f *testing.F) {
	f.Add([]byte("\x01{\"name\":\"a\",\"n\":1,\"raw\":\"AA==\",\"tags\":{\"a\":\"b\"}}"))
	f.Add([]byte("\x02{}"))
	f.Add([]byte("\x01{\"name\":\"a\"} {}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var got sample
		if err := Decode(data, 1, &got); err != nil {
			if k := fault.KindOf(err); k != fault.Precondition {
				t.Fatalf("kind %v", k)
			}
			return
		}
		if data[0] > 1 || !json.Valid(data[1:]) {
			t.Fatalf("%q was decoded", data)
		}
		once, err := Encode(data[0], got)
		if err != nil {
			t.Fatal(err)
		}
		var again sample
		if err := Decode(once, 1, &again); err != nil {
			t.Fatal(err)
		}
		if twice, err := Encode(data[0], again); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%q became %q (%v)", once, twice, err)
		}
	})
}
