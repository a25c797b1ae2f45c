package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
)

// A test is a test function or a fuzz target.
type test struct {
	dir, file, name string
	tags            string // what it is built with, empty: always
}

func (t test) String() string { return t.dir + "." + t.name }

func (t test) compare(other test) int {
	return cmp.Or(cmp.Compare(t.dir, other.dir), cmp.Compare(t.file, other.file), cmp.Compare(t.name, other.name))
}

// A mention is a span in a comment, with the tests that the comment is about.
type mention struct {
	span  span
	where string
	tests []test
}

// scan reads the comments of all test files, whatever their build tags.
func scan(root string) ([]mention, error) {
	packages := map[string]*testPackage{}
	var order []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "out" || d.Name() == "bin" || d.Name() == ".git" || d.Name() == "testdata"):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		// A package and its external tests don't share names.
		key := dir + " " + file.Name.Name
		if packages[key] == nil {
			packages[key] = &testPackage{dir: filepath.ToSlash(dir)}
			order = append(order, key)
		}
		packages[key].add(set, file, filepath.Base(path))
		return nil
	})
	if err != nil {
		return nil, err
	}
	var all []mention
	for _, key := range order {
		all = append(all, packages[key].mentions()...)
	}
	return all, nil
}

// testPackage is the declarations and the comments of one package's tests.
type testPackage struct {
	dir      string
	decls    []*decl
	comments []comment
}

// A decl is a top-level declaration.
type decl struct {
	names map[string]bool
	uses  map[string]bool
	test  *test
}

type comment struct {
	text, where string
	decl        *decl // nil: outside of all
}

func (p *testPackage) add(set *token.FileSet, file *ast.File, name string) {
	var own []*decl
	var starts, ends []int
	for _, d := range file.Decls {
		one := &decl{names: map[string]bool{}, uses: map[string]bool{}}
		start := d.Pos()
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Doc != nil {
				start = d.Doc.Pos()
			}
			one.names[d.Name.Name] = true
			if d.Recv == nil && isTest(d.Name.Name) {
				one.test = &test{dir: p.dir, file: name, name: d.Name.Name, tags: tags(file)}
			}
		case *ast.GenDecl:
			if d.Doc != nil {
				start = d.Doc.Pos()
			}
			for _, spec := range d.Specs {
				switch spec := spec.(type) {
				case *ast.ValueSpec:
					for _, n := range spec.Names {
						one.names[n.Name] = true
					}
				case *ast.TypeSpec:
					one.names[spec.Name.Name] = true
				}
			}
		}
		ast.Inspect(d, func(n ast.Node) bool {
			if i, ok := n.(*ast.Ident); ok && !one.names[i.Name] {
				one.uses[i.Name] = true
			}
			return true
		})
		own = append(own, one)
		starts, ends = append(starts, set.Position(start).Line), append(ends, set.Position(d.End()).Line)
	}
	p.decls = append(p.decls, own...)
	for _, group := range file.Comments {
		for _, c := range group.List {
			line := set.Position(c.Pos()).Line
			one := comment{text: c.Text, where: fmt.Sprintf("%s/%s:%d", p.dir, name, line)}
			for i := range own {
				if starts[i] <= line && line <= ends[i] {
					one.decl = own[i]
				}
			}
			p.comments = append(p.comments, one)
		}
	}
}

func isTest(name string) bool {
	return strings.HasPrefix(name, "Test") && name != "TestMain" || strings.HasPrefix(name, "Fuzz")
}

func tags(file *ast.File) string {
	for _, group := range file.Comments {
		for _, c := range group.List {
			if c.Pos() < file.Package && constraint.IsGoBuild(c.Text) {
				return strings.TrimSpace(strings.TrimPrefix(c.Text, "//go:build"))
			}
		}
	}
	return ""
}

func (p *testPackage) mentions() []mention {
	var all []mention
	for _, c := range p.comments {
		for _, s := range mentions(c.text) {
			all = append(all, mention{s, c.where, p.testsOf(c.decl)})
		}
	}
	return all
}

// testsOf returns d if it is a test, else the test functions that use it,
// directly or by way of others. A fuzz target is not among these: it has the
// table for seeds, and may judge them by something else.
func (p *testPackage) testsOf(d *decl) []test {
	if d == nil {
		return nil
	}
	var found []test
	seen := map[*decl]bool{d: true}
	for queue := []*decl{d}; len(queue) > 0; queue = queue[1:] {
		one := queue[0]
		if one.test != nil {
			if one == d || !strings.HasPrefix(one.test.name, "Fuzz") {
				found = append(found, *one.test)
			}
			continue
		}
		for _, other := range p.decls {
			if !seen[other] && other.usesAny(one.names) {
				seen[other] = true
				queue = append(queue, other)
			}
		}
	}
	return found
}

func (d *decl) usesAny(names map[string]bool) bool {
	for n := range names {
		if d.uses[n] {
			return true
		}
	}
	return false
}
