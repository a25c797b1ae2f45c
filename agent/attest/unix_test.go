package attest

import (
	"errors"
	"io/fs"
	"os/user"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func fakeUnix() *Unix {
	return &Unix{
		users: names{lookup: func(n string) (string, error) {
			if n == "1000" {
				return "alice", nil
			}
			return "", user.UnknownUserIdError(5)
		}},
		groups: names{lookup: func(n string) (string, error) {
			switch n {
			case "100":
				return "users", nil
			case "27":
				return "sudo", nil
			case "13":
				return "bad\nname", nil
			}
			return "", user.UnknownGroupIdError(n)
		}},
	}
}

func TestUnixSelectorsAreNamedLikeSPIREs(t *testing.T) {
	set, err := fakeUnix().Selectors(t.Context(), Process{UID: 1000, GID: 100, Groups: []uint32{27, 13, 999}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range set {
		got = append(got, s.String())
	}
	want := []string{
		"unix:gid:100", "unix:group:users",
		"unix:supplementary_gid:13", "unix:supplementary_gid:27", "unix:supplementary_gid:999", "unix:supplementary_group:sudo",
		"unix:uid:1000", "unix:user:alice",
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q\nwant %q", got, want)
	}
}

func TestUnknownNamesGiveNoSelector(t *testing.T) {
	set, err := fakeUnix().Selectors(t.Context(), Process{UID: 5, GID: 6})
	if err != nil || len(set) != 2 {
		t.Fatalf("%v %v", set, err)
	}
}

func TestNamesThatCannotBeLookedUpFail(t *testing.T) {
	for _, tc := range []struct {
		err  error
		fail bool
	}{{errors.New("directory service is down"), true}, {fs.ErrNotExist, false}} {
		u := fakeUnix()
		u.users.lookup = func(string) (string, error) { return "", tc.err }
		set, err := u.Selectors(t.Context(), Process{UID: 1000, GID: 100})
		if (err != nil) != tc.fail || (set == nil) != tc.fail {
			t.Errorf("%v: %v %v", tc.err, set, err)
		}
	}
}

func TestNamesAreKeptForAShortTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		n := names{lookup: func(string) (string, error) { calls++; return "alice", nil }}
		for range 3 {
			if name, err := n.of(7, time.Now()); err != nil || name != "alice" {
				t.Fatal(name, err)
			}
		}
		if calls != 1 {
			t.Fatalf("%d look-ups", calls)
		}
		time.Sleep(nameTTL)
		if _, err := n.of(7, time.Now()); err != nil || calls != 2 {
			t.Fatalf("%d look-ups, %v", calls, err)
		}
	})
}

func TestNamesAreBounded(t *testing.T) {
	n := names{lookup: func(string) (string, error) { return "x", nil }}
	for i := range uint32(3 * maxNames) {
		if _, err := n.of(i, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if len(n.known) > maxNames {
		t.Fatalf("%d names kept", len(n.known))
	}
}
